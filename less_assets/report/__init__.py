"""What people read: charts, tables and the selection report. No mathematics, no storage."""
