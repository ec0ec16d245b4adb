"""Many runs in a database, a table, MLflow."""
