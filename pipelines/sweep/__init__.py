"""`ptv2 sweep`: searches under Prefect, whose trials train side by side and survive what dies."""
