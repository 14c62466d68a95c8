"""What the tables and sentences of the pages say of each kind of record."""
