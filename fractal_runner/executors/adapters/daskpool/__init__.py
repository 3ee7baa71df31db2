"""A pool of Dask's workers: who owns them (`desk`), who uses them (`crew`), what runs in them (`seat`)."""
