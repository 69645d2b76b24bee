"""What people look at: figures and tables. The only importer of matplotlib."""
