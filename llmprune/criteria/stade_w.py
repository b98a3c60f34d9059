"""STADE-W: Wanda where a norm feeds the site, STADE elsewhere."""

from __future__ import annotations

from llmprune.criteria.stade import Stade
from llmprune.errors import InputError
from llmprune.sites import Site

FED_BY_A_NORM = frozenset(
    "q_proj k_proj v_proj gate_proj up_proj fc1 "  # as in the authors' code
    "qkv_proj query_key_value c_attn gate_up_proj c_fc dense_h_to_4h".split()
)
NOT_FED_BY_A_NORM = frozenset(["o_proj", "out_proj", "down_proj", "fc2", "dense", "c_proj", "dense_4h_to_h"])


class StadeW(Stade):
    """The switch goes by the site's role, as in the authors' code; for another role, by what was observed:
    whether the site's input is the output of a norm of its block. arXiv 2503.22451.
    """

    name = "stade-w"
    summary = "wanda on sites fed by a norm, stade on the others"
    source = "arXiv 2503.22451, its second version's names"

    def wants_bias(self, site: Site) -> bool:
        """True on sites that no norm feeds."""
        return super().wants_bias(site) and not _fed_by_norm(site)


def _fed_by_norm(site: Site) -> bool:
    if site.role in FED_BY_A_NORM:
        return True
    if site.role in NOT_FED_BY_A_NORM:
        return False
    if site.fed_by_norm is None:
        raise InputError(f"cannot tell whether a norm feeds {site.name}: use --method stade or wanda for this model")
    return site.fed_by_norm
