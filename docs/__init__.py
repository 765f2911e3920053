"""The pages, and the code that draws their pictures: ``python -m docs.figures``."""
