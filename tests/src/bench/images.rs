//! How large the images are that users pull.

use anyhow::Result;

use crate::images;
pub use crate::images::Size as Figures;

/// Builds both from the Dockerfile, on a base like the official one.
pub fn run() -> Result<()> {
    let sizes = images::sizes(&images::slim()?)?;
    for size in &sizes {
        eprintln!(
            "bench: image of the {}: {} bytes compressed, {} unpacked",
            size.name, size.compressed, size.uncompressed
        );
    }
    super::keep("images", &sizes)
}
