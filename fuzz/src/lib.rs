//! Harnesses shared by the fuzz targets.

pub mod guest;
