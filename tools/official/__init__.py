"""What runs published code on a tiny Llama, one module a repository; nothing of that code is here."""
