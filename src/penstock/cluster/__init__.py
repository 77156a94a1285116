"""Several instances behind one server: the front with the dispatcher, and Ray below it."""
