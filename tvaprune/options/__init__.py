"""The options of methods and stages: dataclasses that params.yaml is validated into and the core takes whole."""
