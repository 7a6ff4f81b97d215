"""GPT-J (Wang and Komatsuzaki, 2021): 6B parameters, parallel attention and MLP, rotary positions."""
