"""What tests of several rooms share: tiny data and models, whole runs, kills and faults."""
