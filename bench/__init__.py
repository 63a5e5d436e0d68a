"""The bench: run methods on models, measure what was saved, keep records, rank them."""
