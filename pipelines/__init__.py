"""Orchestration: settings, sources, stages, and adapters to DVC, Prefect, Optuna and MLflow."""
