"""What people look at: pictures, the report of a run, masks for new images."""
