"""RoBERTa (Liu et al., 2019, arXiv:1907.11692): BERT trained longer, on masked tokens alone."""
