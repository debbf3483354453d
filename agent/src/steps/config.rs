//! The CNI config. Calico's sorts before flannel's, and is put in place first: there is no instant without a config.

use crate::host::files;
use crate::journal::Captured;
use crate::steps::Error;

/// What Calico's plugin reaches the API server with, beside its config; each installer writes it anew.
pub const KUBECONFIG: &str = "calico-kubeconfig";

/// Calico's in, flannel's out; the text of flannel's is in the journal.
pub fn swap(captured: &Captured) -> Result<(), Error> {
    files::write(&captured.calico_path, captured.calico_config.as_bytes(), 0o644)?;
    for config in captured.configs.iter().filter(|config| config.path != captured.calico_path) {
        files::remove(&config.path)?;
    }
    if captured.canal {
        // Without it Calico's plugin gives out no address before those of the pods that are there are registered.
        files::remove(&captured.calico_path.with_file_name(KUBECONFIG))?;
    }
    Ok(())
}

/// flannel's in, Calico's out.
pub fn swap_back(captured: &Captured) -> Result<(), Error> {
    for config in &captured.configs {
        files::write(&config.path, config.text.as_bytes(), config.mode)?;
    }
    match &captured.calico_before {
        Some(config) => files::write(&config.path, config.text.as_bytes(), config.mode)?,
        None => files::remove(&captured.calico_path)?,
    }
    Ok(())
}
