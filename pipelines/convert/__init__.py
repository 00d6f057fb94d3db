"""Write a converted data set."""
