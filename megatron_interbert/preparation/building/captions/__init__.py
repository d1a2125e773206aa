"""Read captions from the files in which data sets publish them, and keep them by image."""
