"""The measures, one file for each kind; every module here is imported and may register some."""
