"""Mine hard negatives by TF-IDF (terms, index, search, resumable work folder) and neighbours of
images.
"""
