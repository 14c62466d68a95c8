"""What tttc is compared with where no library has it: the same things written by hand in plain torch."""
