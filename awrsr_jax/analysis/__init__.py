"""From run folders to figures, tests of significance and reports."""
