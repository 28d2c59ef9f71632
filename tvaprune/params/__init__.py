"""One module a stage, so that an edit to one stage's parameters reruns that stage alone."""
