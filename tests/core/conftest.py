"""Helpers of these tests assert too: let pytest explain those as well."""

import pytest

pytest.register_assert_rewrite("tests.core.shard")
