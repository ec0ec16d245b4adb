"""A recipe's stages in order, each kept under the hash of all that went into it."""
