"""Options of each method and stage: dataclasses without torch, which params validates and the core takes whole."""
