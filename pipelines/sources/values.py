"""Values of typed sources (Parquet, Arrow) as what JSON can hold."""

import math
from datetime import date, time
from decimal import Decimal
from typing import Any


def json_value(value: Any) -> Any:
    """Return `value` as JSON can hold it: dates and decimals as text, NaN as null.

    Raises:
        TypeError: If there is no faithful text for it, as for bytes.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    raise TypeError(type(value).__name__)
