"""Makes the pages of the documentation site that are derived, and lays them beside those that are written.

pages       the whole: every page into a folder, and the builder's config with the navigation
layouts     a page for each data layout, from the small files of `tests/data/formats` and what the code reads in them
reference   settings, commands, stages, gates: from their records
notebooks   notebooks as pages; they are executed here, too
"""
