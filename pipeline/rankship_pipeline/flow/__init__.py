"""The stages of a recipe in order, each kept under the hash of all that went into it."""
