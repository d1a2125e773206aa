"""Prepare data for training: build, inspect and mine region stores. Training does not import this
package.
"""
