"""The pages for people; they read the store by ``queries`` and change it by ``actions``."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(include_in_schema=False)
