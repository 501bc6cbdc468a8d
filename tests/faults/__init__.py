"""What can go wrong around a run, done to real ones: a fast part with all tests, the long one by marker `faults`."""

import pytest

pytest.register_assert_rewrite("faults.runs")  # so that assert_equal says what differs
