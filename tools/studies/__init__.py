"""Run studies that train many models: what each part is worth, and our text path beside BERT."""
