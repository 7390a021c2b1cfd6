//! `docs/verifier-cost.md`: what the verifier went through, per program and kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::guest::Cost;
use crate::env;

/// Half of what every kernel allows a program. Past it, the next change may not load.
pub const MOST_INSTRUCTIONS: u32 = 500_000;

const HEAD: &str = "# Cost of verification

What the kernel's verifier goes through for each program of the smallest size class, and the bytes of stack of its deepest
chain of calls. A kernel refuses a program after 1 000 000 instructions or 512 bytes. The suite fails past 500 000 instructions
on any kernel. Written by `cargo xtask vm --record`.

";

/// The table: by program, by column (a kernel's name).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    rows: BTreeMap<String, BTreeMap<String, (u32, Option<u32>)>>,
}

impl Table {
    /// The file that is committed.
    pub fn path() -> PathBuf {
        env::root().join("docs/verifier-cost.md")
    }

    /// What was recorded; empty where nothing was.
    pub fn recorded() -> Result<Self> {
        match fs::read_to_string(Self::path()) {
            Ok(text) => Self::parse(&text).context("docs/verifier-cost.md"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error.into()),
        }
    }

    fn parse(text: &str) -> Result<Self> {
        let mut rows = text
            .lines()
            .filter_map(|line| line.strip_prefix('|')?.strip_suffix('|'))
            .map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
        let mut table = Self::default();
        let Some(header) = rows.next() else {
            return Ok(table);
        };
        for row in rows.skip(1) {
            let (program, cells) = row.split_first().context("an empty row")?;
            for (column, cell) in header.iter().skip(1).zip(cells) {
                if *cell != "-" {
                    let cell = parse_cell(cell).with_context(|| format!("the cell {cell:?}"))?;
                    table.set(column, program, cell);
                }
            }
        }
        Ok(table)
    }

    fn set(&mut self, column: &str, program: &str, cell: (u32, Option<u32>)) {
        let row = self.rows.entry(program.to_owned()).or_default();
        row.insert(column.to_owned(), cell);
    }

    /// Replaces a kernel's column.
    pub fn replace(&mut self, column: &str, costs: &[Cost]) {
        for row in self.rows.values_mut() {
            row.remove(column);
        }
        for cost in costs {
            self.set(column, &cost.program, (cost.instructions, cost.stack));
        }
        self.rows.retain(|_, row| !row.is_empty());
    }

    /// Says where these costs are over a tenth away from what is recorded.
    pub fn differences(&self, column: &str, costs: &[Cost]) -> Vec<String> {
        let is_near = |was: u32, now: u32| now.abs_diff(was) <= was / 10;
        costs
            .iter()
            .filter_map(|cost| {
                let (program, now) = (&cost.program, cost.instructions);
                match self.rows.get(program).and_then(|row| row.get(column)) {
                    Some((was, _)) if is_near(*was, now) => None,
                    Some((was, _)) => Some(format!("{program}: {now}, recorded {was}")),
                    None => Some(format!("{program}: {now}, not recorded")),
                }
            })
            .collect()
    }

    fn columns(&self) -> Vec<&str> {
        let names: BTreeSet<&str> = self
            .rows
            .values()
            .flat_map(BTreeMap::keys)
            .map(String::as_str)
            .collect();
        let mut names: Vec<_> = names.into_iter().collect();
        // 6.1 before 6.12 before 6.18.
        names.sort_by_key(|name| {
            name.split('.')
                .map(|part| part.parse::<u32>().unwrap_or(u32::MAX))
                .collect::<Vec<_>>()
        });
        names
    }

    fn render(&self) -> String {
        let columns = self.columns();
        let mut text = format!("{HEAD}| program | {} |\n", columns.join(" | "));
        text += &format!("|---|{}\n", "---|".repeat(columns.len()));
        for (program, row) in &self.rows {
            text += &format!("| {program} |");
            for column in &columns {
                let cell = match row.get(*column) {
                    Some((instructions, Some(stack))) => {
                        format!("{instructions} instructions, {stack} bytes")
                    }
                    Some((instructions, None)) => format!("{instructions} instructions"),
                    None => "-".to_owned(),
                };
                text += &format!(" {cell} |");
            }
            text += "\n";
        }
        text
    }

    /// Writes the file.
    pub fn write(&self) -> Result<()> {
        Ok(fs::write(Self::path(), self.render())?)
    }
}

fn parse_cell(cell: &str) -> Option<(u32, Option<u32>)> {
    let mut words = cell.split_whitespace();
    let instructions = words.next()?.parse().ok()?;
    let stack = match words.nth(1) {
        Some(bytes) => Some(bytes.parse().ok()?),
        None => None,
    };
    Some((instructions, stack))
}

/// The costs past the bound.
pub fn excessive(costs: &[Cost]) -> Vec<String> {
    costs
        .iter()
        .filter(|cost| cost.instructions > MOST_INSTRUCTIONS)
        .map(|cost| {
            format!(
                "{}: {} verified instructions, over {MOST_INSTRUCTIONS}",
                cost.program, cost.instructions
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::kernels::Kernel;
    use super::*;

    fn cost(program: &str, instructions: u32, stack: Option<u32>) -> Cost {
        Cost {
            program: program.to_owned(),
            instructions,
            stack,
        }
    }

    #[test]
    fn a_table_is_read_as_it_was_written() {
        let mut table = Table::default();
        table.replace("6.18", &[cost("a", 5, Some(96)), cost("b", 7, None)]);
        table.replace("6.1", &[cost("a", 9, Some(104))]);
        table.replace("6.12", &[cost("a", 8, None)]);
        assert_eq!(table.columns(), ["6.1", "6.12", "6.18"]);
        assert_eq!(Table::parse(&table.render()).unwrap(), table);
        // A new measurement takes the place of the whole column.
        table.replace("6.18", &[cost("a", 6, None)]);
        assert_eq!(table.rows.len(), 1);
        assert!(Table::parse("| program | 6.1 |\n|---|---|\n| a | many |\n").is_err());
    }

    #[test]
    fn growth_is_said() {
        let mut table = Table::default();
        table.replace("6.1", &[cost("a", 1000, None)]);
        assert!(
            table
                .differences("6.1", &[cost("a", 1100, None)])
                .is_empty()
        );
        let differences = table.differences("6.1", &[cost("a", 1101, None), cost("b", 1, None)]);
        assert_eq!(
            differences,
            ["a: 1101, recorded 1000", "b: 1, not recorded"]
        );
        assert!(excessive(&[cost("a", 500_000, None)]).is_empty());
        assert_eq!(excessive(&[cost("a", 500_001, None)]).len(), 1);
    }

    #[test]
    fn what_is_recorded_is_within_bounds_on_every_kernel() {
        let table = Table::recorded().unwrap();
        let columns = table.columns();
        for kernel in Kernel::ALL {
            assert!(columns.contains(&kernel.name()), "{columns:?}");
        }
        assert!(columns.len() > Kernel::ALL.len(), "and on the host's");
        for (program, row) in &table.rows {
            assert_eq!(row.len(), columns.len(), "{program}");
            for (column, (instructions, stack)) in row {
                assert!(*instructions <= MOST_INSTRUCTIONS, "{program} on {column}");
                assert!(
                    stack.is_none_or(|bytes| bytes <= 512),
                    "{program} on {column}"
                );
            }
        }
    }
}
