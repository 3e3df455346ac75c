//! Every struct of `ffi` has the size and the offsets of its namesake in gqa_kernels.h, as the C compiler sees it.

use std::env;
use std::fs;
use std::process::Command;

use gqa_attention::ffi::{AttentionParams, Device, Index, Launch, Layout, Plan, Rotary};

macro_rules! layouts {
    ($($name:ident),*) => { [$(($name::C_NAME, std::mem::size_of::<$name>(), $name::LAYOUT)),*] };
}

fn assertions(name: &str, size: usize, layout: Layout) -> String {
    let mut text = format!("_Static_assert(sizeof({name}) == {size}, \"sizeof({name})\");\n");
    for (field, offset, bytes) in layout {
        text += &format!("_Static_assert(offsetof({name}, {field}) == {offset}, \"offset of {name}.{field}\");\n");
        text += &format!("_Static_assert(sizeof((({name} *)0)->{field}) == {bytes}, \"size of {name}.{field}\");\n");
    }
    text
}

/// What the C compiler says of the assertions: nothing where all hold.
fn complaints(label: &str, text: &str) -> String {
    let source = env::temp_dir().join(format!("gqa_layout_{label}_{}.c", std::process::id()));
    fs::write(&source, format!("#include \"gqa_kernels.h\"\n{text}")).unwrap();
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".into());
    let include = concat!("-I", env!("GQA_KERNELS_INCLUDE"));
    let done = Command::new(compiler).args(["-std=c11", "-fsyntax-only", include]).arg(&source).output().unwrap();
    fs::remove_file(&source).unwrap();
    assert_eq!(done.status.success(), done.stderr.is_empty());
    String::from_utf8_lossy(&done.stderr).into_owned()
}

#[test]
fn layouts_equal_the_header() {
    for (name, size, layout) in layouts!(Index, Rotary, AttentionParams, Device, Launch, Plan) {
        assert_eq!(complaints(name, &assertions(name, size, layout)), "", "{name}");
    }
}

/// The control: a struct that is four bytes too large, or whose field lies elsewhere, is found.
#[test]
fn a_wrong_layout_is_found() {
    let size = std::mem::size_of::<Index>();
    assert!(complaints("size", &assertions("gqa_index", size + 4, Index::LAYOUT)).contains("sizeof(gqa_index)"));
    let moved: Layout = &[("dtype", 12, 4)];
    assert!(complaints("field", &assertions("gqa_index", size, moved)).contains("offset of gqa_index.dtype"));
}
