//! Text to [`super::model::Policy`].

/// One policy file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Name as the user would write it; diagnostics and origins show it.
    pub name: String,
    /// The whole text.
    pub text: String,
}
