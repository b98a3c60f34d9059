"""`python -m llmprune`, which is how `accelerate launch -m llmprune` starts it."""

from llmprune.cli import main

if __name__ == "__main__":
    main()
