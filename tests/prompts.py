"""Texts for the acceptance tests."""

from __future__ import annotations

TEXTS = (
    "The",
    "Once",
    "In",
    "def",
    "The largest planet in",
    "Paris is the capital",
    "Dear Sir or Madam,",
    "2 + 2 =",
    "The largest planet in the solar system is Jupiter, and the smallest is",
    "import numpy as np\n\ndef softmax(values, axis=0):\n    return",
    "Water boils at one hundred degrees, and it freezes at",
    "The recipe needs flour, two eggs, a pinch of salt and some milk",
    "My grandmother used to say that a watched pot never boils, but she always watched the"
    " pot until it did",
    "The French Revolution began in 1789, when the people of Paris stormed the Bastille, a"
    " prison that",
    "To find the area of a circle, multiply the square of its radius by pi, which is about"
    " three and",
    "Q: Which is heavier, a kilogram of feathers or a kilogram of lead, and why is that"
    " so?\nA: Neither",
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of"
    " having nothing to do: once or twice she had peeped into the book her sister was"
    " reading, but it had no pictures or conversations in it, “and what is the use of a"
    " book,” thought Alice “without pictures or conversations?” So she was considering in her"
    " own mind, as well as she could",
    "It is a truth universally acknowledged, that a single man in possession of a good"
    " fortune, must be in want of a wife. However little known the feelings or views of such"
    " a man may be on his first entering a neighbourhood, this truth is so well fixed in the"
    " minds of the surrounding families, that he is considered as the rightful property of"
    " some one or other of their daughters.",
    "Four score and seven years ago our fathers brought forth on this continent, a new"
    " nation, conceived in Liberty, and dedicated to the proposition that all men are created"
    " equal. Now we are engaged in a great civil war, testing whether that nation, or any"
    " nation so conceived and so dedicated, can long endure. We are met on a great"
    " battle-field of that war. We have come to dedicate a portion",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no"
    " money in my purse, and nothing particular to interest me on shore, I thought I would"
    " sail about a little and see the watery part of the world. It is a way I have of driving"
    " off the spleen and regulating the circulation. Whenever I find myself growing grim"
    " about the mouth; whenever it is a damp, drizzly November in my soul",
)

ALICE = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing \
to do: once or twice she had peeped into the book her sister was reading, but it had no pictures \
or conversations in it, “and what is the use of a book,” thought Alice “without pictures or \
conversations?”

So she was considering in her own mind (as well as she could, for the hot day made her feel very \
sleepy and stupid), whether the pleasure of making a daisy-chain would be worth the trouble of \
getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way \
to hear the Rabbit say to itself, “Oh dear! Oh dear! I shall be late!” (when she thought it over \
afterwards, it occurred to her that she ought to have wondered at this, but at the time it all \
seemed quite natural); but when the Rabbit actually took a watch out of its waistcoat-pocket, and \
looked at it, and then hurried on, Alice started to her feet, for it flashed across her mind that \
she had never before seen a rabbit with either a waistcoat-pocket, or a watch to take out of it, \
and burning with curiosity, she ran across the field after it, and fortunately was just in time to \
see it pop down a large rabbit-hole under the hedge.

In another moment down went Alice after it, never once considering how in the world she was to get \
out again.

The rabbit-hole went straight on like a tunnel for some way, and then dipped suddenly down, so \
suddenly that Alice had not a moment to think about stopping herself before she found herself \
falling down a very deep well.

Either the well was very deep, or she fell very slowly, for she had plenty of time as she went \
down to look about her and to wonder what was going to happen next. First, she tried to look down \
and make out what she was coming to, but it was too dark to see anything; then she looked at the \
sides of the well, and noticed that they were filled with cupboards and book-shelves; here and \
there she saw maps and pictures hung upon pegs. She took down a jar from one of the shelves as she \
passed; it was labelled “ORANGE MARMALADE”, but to her great disappointment it was empty: she did \
not like to drop the jar for fear of killing somebody underneath, so managed to put it into one of \
the cupboards as she fell past it.

“Well!” thought Alice to herself, “after such a fall as this, I shall think nothing of tumbling \
down stairs! How brave they’ll all think me at home! Why, I wouldn’t say anything about it, even \
if I fell off the top of the house!” (Which was very likely true.)
"""
"""From Alice's Adventures in Wonderland by Lewis Carroll (1865), in the public domain.

A little over 512 tokens.
"""
