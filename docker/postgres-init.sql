-- One server, a database for each of its two tenants. Runs once, when the volume is empty.
CREATE DATABASE mlflow;
CREATE DATABASE prefect;
