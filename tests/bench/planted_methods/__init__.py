"""Methods for tests of the bench, found the way real ones are."""
