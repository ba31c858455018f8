"Experiments that anyone can rerun; not part of the installed package."
