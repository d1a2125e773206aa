"""Hard negatives by TF-IDF: terms, index, search, and the work folder that survives kills."""
