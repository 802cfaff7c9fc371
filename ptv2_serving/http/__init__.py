"""The outside of the server: limits, tokens, errors, metrics and logs around a `Service`."""
