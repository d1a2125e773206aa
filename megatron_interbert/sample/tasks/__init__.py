"""Write a generated world for the field's tasks: scenes, and annotations in the official formats.

Answers follow from the scenes alone. Every kind of question is drawn so that neither its text nor
its image tells the answer by itself: what is asked comes in couples with opposite answers, about
one image and with the same distribution of words.
"""
