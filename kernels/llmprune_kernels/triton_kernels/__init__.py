"""All @triton.jit functions. Nothing here is imported before a kernel is launched."""
