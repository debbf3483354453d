//! Calico's objects: their shapes, and how they are prepared, without ever disturbing what uses them.

pub mod announced;
pub mod block;
pub mod canal;
pub mod claim;
pub mod family;
pub mod ipam;
pub mod kept;
pub mod layout;
pub mod names;
pub mod prepare;
pub mod release;
pub mod stock;
pub mod types;
