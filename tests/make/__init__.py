"""What tests are made of: records, files, models and pretended devices that more than one test file needs."""
