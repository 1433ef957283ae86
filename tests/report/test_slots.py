"""The picture of places: a newcomer sees which place is weak, in the page and in its Markdown twin."""

from __future__ import annotations

import pytest
from tests.report.conftest import *  # noqa: F403

from beholder.report import slots
