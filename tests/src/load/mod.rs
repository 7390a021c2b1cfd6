//! Load: policies of a size, offered traffic, and what may stand in its way.

pub mod connection;
pub mod flood;
pub mod measure;
pub mod nftables;
pub mod policy;
pub mod router;
pub mod sender;
pub mod subject;
