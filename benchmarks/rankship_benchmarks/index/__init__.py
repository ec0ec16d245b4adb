"""Many runs in a database, in a table file, and in MLflow."""
