//! Gleaner's migration stream.
